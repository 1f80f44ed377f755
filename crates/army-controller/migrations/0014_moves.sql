-- The permission to run a VM: the incarnation that may run. Each move to another host has a greater one.
ALTER TABLE vms ADD COLUMN epoch BIGINT NOT NULL DEFAULT 1;
-- The host that the VM is being moved to; NULL where it is not being moved.
ALTER TABLE vms ADD COLUMN destination TEXT;
-- The labels that the VM's host must have, in JSON.
ALTER TABLE vms ADD COLUMN host_labels TEXT NOT NULL DEFAULT '{}';
