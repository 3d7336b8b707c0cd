"""What the report shows, a module for each kind of thing: measured figures in, what the templates print out."""
