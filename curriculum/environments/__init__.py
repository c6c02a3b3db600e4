"""What an environment's author imports: ``from isomorph.curriculum.environments import Done``."""

from isomorph.curriculum.environments.done import Done, Environment

__all__ = ["Done", "Environment"]
