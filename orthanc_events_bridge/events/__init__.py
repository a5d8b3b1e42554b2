"""How a change is told to the world: the catalog of event types, and the mapping to CloudEvents."""
