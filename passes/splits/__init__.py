"""What each kind of op makes of forms: one file per family, registered with `passes.split`."""
