"""Methods that ask the network only what it makes of altered pictures."""
