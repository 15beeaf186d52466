"""The churn simulator: production code under virtual time."""
