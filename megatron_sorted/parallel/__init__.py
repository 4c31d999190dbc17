"""Who does what: process groups, parameter copies on several stages, numbers carried between stages."""
