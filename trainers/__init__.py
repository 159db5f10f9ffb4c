"""The data, the policy and the loop. Imports losses."""
