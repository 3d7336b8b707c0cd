"""What a stage leaves and shows: its record, locks, files that appear complete, progress and monitoring."""
