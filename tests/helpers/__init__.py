"""What several test files share; importable as `helpers` (pytest's ``pythonpath``)."""
