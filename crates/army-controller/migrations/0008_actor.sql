-- The id of the key whose request it was, or `system`.
ALTER TABLE events ADD COLUMN actor TEXT NOT NULL DEFAULT 'system';
