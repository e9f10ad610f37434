"""Jobs around the library: data, models, training loops, studies."""
