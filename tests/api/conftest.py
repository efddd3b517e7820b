from tests.backend import anonymous, app, database, fabric, inside, operator, postgres, state_dir, stranger, user

__all__ = ["anonymous", "app", "database", "fabric", "inside", "operator", "postgres", "state_dir", "stranger", "user"]
