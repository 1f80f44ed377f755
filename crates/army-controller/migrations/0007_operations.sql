-- Work that was requested: it is recorded before it begins, and done whatever becomes of its client.
CREATE TABLE operations (
    id TEXT PRIMARY KEY NOT NULL,
    tenant TEXT NOT NULL,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    -- running, succeeded or failed
    state TEXT NOT NULL,
    -- What was requested, in JSON, without secrets.
    request TEXT NOT NULL,
    -- The name of the template that is being made.
    reserves TEXT,
    -- The controller that carries the operation out.
    owner TEXT NOT NULL,
    -- The id of the key that requested the operation.
    actor TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    updated_ms BIGINT NOT NULL,
    ended_ms BIGINT,
    progress TEXT,
    -- What cannot be computed from other rows of what was made, in JSON; NULL where nothing was made.
    result TEXT,
    -- Why the operation failed, in JSON.
    error TEXT,
    idempotency_key TEXT,
    -- BLAKE3 of what was requested, where there is a key.
    request_hash TEXT
);

CREATE UNIQUE INDEX operations_keys ON operations (tenant, idempotency_key);
CREATE UNIQUE INDEX operations_reserves ON operations (reserves) WHERE state = 'running';
CREATE INDEX operations_list ON operations (created_ms, id);
CREATE INDEX operations_of_tenants ON operations (tenant, created_ms, id);
CREATE INDEX operations_running ON operations (kind, subject) WHERE state = 'running';
CREATE INDEX operations_ended ON operations (ended_ms);

-- The operation that creates the VM.
ALTER TABLE vms ADD COLUMN operation TEXT;
CREATE INDEX vms_operations ON vms (operation);

-- ready, or removing
ALTER TABLE templates ADD COLUMN state TEXT NOT NULL DEFAULT 'ready';

DROP TABLE requests;
