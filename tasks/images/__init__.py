"""Images to calibrate on and to measure on: named, drawn, preprocessed by the model's own processor, stored."""
