"""What requests used: tokens as the engine counted them."""
