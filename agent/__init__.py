"""The program beside Envoy: registers its node, follows its site's snapshot, drives Envoy, and reports."""
