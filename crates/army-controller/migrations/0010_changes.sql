-- What happens to a VM when nobody uses it, in JSON; NULL where nothing does.
ALTER TABLE vms ADD COLUMN idle TEXT;
-- The number of changes of a VM that were requested, and of those that its host has applied.
ALTER TABLE vms ADD COLUMN revision BIGINT NOT NULL DEFAULT 0;
ALTER TABLE vms ADD COLUMN applied BIGINT NOT NULL DEFAULT 0;

CREATE INDEX vms_unapplied ON vms (host) WHERE applied < revision;
