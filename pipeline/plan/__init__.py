"""From a config to the stages that are missing."""
