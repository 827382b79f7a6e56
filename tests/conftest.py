"""Properties are checked on a machine that does other things too: an example that takes long is no failure."""

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
