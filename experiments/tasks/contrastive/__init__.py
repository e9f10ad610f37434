"""Image-text pairs with a contrastive loss."""
