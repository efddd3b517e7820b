"""The schema's history, shipped with the package; `isthmus-controlplane migrate` applies it."""
