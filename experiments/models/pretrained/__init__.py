"""Published weights and the settings they were trained with."""
