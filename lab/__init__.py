"""Programs for developers: studies, benchmark, pretraining, chaos. May import anything."""
