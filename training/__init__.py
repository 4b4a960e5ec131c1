"""How the built-in model is made: text, vocabulary, training, export. Not part of the wheel."""
