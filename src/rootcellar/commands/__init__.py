"""The commands of ``rootcellar``, a module each: ``configure(parser)`` declares its options, ``run(args)`` does it."""
