"""Hosts that are namespaces: `netns` and `cloud` make them, `faults` has the scenarios, `oracle` compares the runs."""
