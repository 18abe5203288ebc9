"""Programs that run by themselves, under any LeRobot: nothing beside them may hide a package."""
