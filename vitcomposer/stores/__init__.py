"""Object stores: addresses, objects, downloads."""
