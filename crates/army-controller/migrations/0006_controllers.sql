-- Controllers whose term has not ended. A term ends when its row is deleted: by its own controller
-- when it stops, or by another one when the lease has run out.
CREATE TABLE controllers (
    id TEXT PRIMARY KEY NOT NULL,
    -- Greater than the epoch of every earlier term.
    epoch BIGINT NOT NULL UNIQUE,
    -- Until when the controller counts as alive, in milliseconds since 1970 by the database's clock.
    lease_ms BIGINT NOT NULL
);

-- The fingerprint of the authority that all controllers of a cluster share: one row.
CREATE TABLE cluster_authority (
    one BIGINT PRIMARY KEY NOT NULL,
    fingerprint TEXT NOT NULL
);

-- The controller that runs the host's task; NULL where none does.
ALTER TABLE hosts ADD COLUMN owner TEXT;
-- Grows with each change of the owner. Nodes refuse requests with an older one than they have seen.
ALTER TABLE hosts ADD COLUMN epoch BIGINT NOT NULL DEFAULT 0;
-- 1 while the owner has reports of the host.
ALTER TABLE hosts ADD COLUMN reachable BIGINT NOT NULL DEFAULT 0;
-- What else other controllers need to know of the host's last report, in JSON.
ALTER TABLE hosts ADD COLUMN facts TEXT NOT NULL DEFAULT '{}';

-- The controller that creates the VM, or created it; NULL for VMs of former releases.
ALTER TABLE vms ADD COLUMN creator TEXT;
-- Grows with each change of any VM: whoever has read up to one reads on from it.
ALTER TABLE vms ADD COLUMN changed BIGINT NOT NULL DEFAULT 0;
-- When the VM ended, in milliseconds since 1970; NULL while it has not.
ALTER TABLE vms ADD COLUMN ended_ms BIGINT;

-- Secrets of VMs that have ended are nobody's any more.
UPDATE vms SET ended_ms = created_ms, environment = '{}' WHERE alive = 0;

CREATE INDEX vms_changed ON vms (changed);
CREATE INDEX vms_of_hosts ON vms (host, number) WHERE alive = 1;
CREATE INDEX vms_of_templates ON vms (template, number) WHERE alive = 1;
CREATE INDEX vms_of_all_tenants ON vms (number) WHERE alive = 1;
CREATE INDEX vms_ever_of_tenants ON vms (tenant, number);
CREATE INDEX vms_ever_of_hosts ON vms (host, number);
CREATE INDEX vms_ever_of_templates ON vms (template, number);
CREATE INDEX vms_ended ON vms (ended_ms) WHERE alive = 0;
CREATE INDEX join_tokens_by_end ON join_tokens (expires_ms);
