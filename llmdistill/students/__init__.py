"""Students: where they come from, how they are made smaller, adapted, quantised and saved."""
