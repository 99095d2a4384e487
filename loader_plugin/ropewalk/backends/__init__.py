"""What runs a layer: the operations that a backend offers, in plain torch and on the compiled core."""
