"""What users said of hits: kept, taken into trainings, and looked through for advice."""
