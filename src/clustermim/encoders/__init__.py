"""What an encoder is: the contract, presets, and the key maps of neighbouring layouts."""
