"""Text sides: class names -> a classifier of image features. A text side is a file and a line of `registry.PROMPTS`."""
