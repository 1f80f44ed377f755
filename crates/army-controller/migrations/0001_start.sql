-- Only what SQLite and PostgreSQL both understand: TEXT and BIGINT, truth as 0 or 1, JSON as TEXT.

CREATE TABLE tenants (
    name TEXT PRIMARY KEY NOT NULL,
    max_vms BIGINT
);

CREATE TABLE access_keys (
    id TEXT PRIMARY KEY NOT NULL,
    -- BLAKE3 of the secret, which has 256 bits of its own.
    hash TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    role TEXT NOT NULL,
    created_ms BIGINT NOT NULL
);

CREATE TABLE hosts (
    name TEXT PRIMARY KEY NOT NULL,
    labels TEXT NOT NULL,
    draining BIGINT NOT NULL,
    seen_ms BIGINT NOT NULL,
    capacity TEXT NOT NULL
);

CREATE TABLE templates (
    name TEXT PRIMARY KEY NOT NULL,
    id TEXT NOT NULL,
    host TEXT NOT NULL,
    standbys BIGINT NOT NULL,
    facts TEXT NOT NULL
);

CREATE TABLE vms (
    id TEXT PRIMARY KEY NOT NULL,
    -- Grows with each row: the order of lists.
    number BIGINT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    tenant TEXT NOT NULL,
    template TEXT NOT NULL,
    host TEXT NOT NULL,
    -- What was asked for: 1 to be there, 0 to be gone.
    wanted BIGINT NOT NULL,
    -- What was last heard.
    state TEXT NOT NULL,
    -- 1 while it holds its name and its place.
    alive BIGINT NOT NULL,
    reason TEXT,
    labels TEXT NOT NULL,
    environment TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT,
    fork TEXT,
    memory TEXT,
    -- The idempotency key of the request that made it.
    request TEXT
);

CREATE UNIQUE INDEX vms_names ON vms (tenant, name) WHERE alive = 1;
CREATE INDEX vms_alive ON vms (alive, tenant, number);

CREATE TABLE events (
    id BIGINT PRIMARY KEY NOT NULL,
    time_ms BIGINT NOT NULL,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    tenant TEXT NOT NULL,
    detail TEXT NOT NULL
);

CREATE TABLE requests (
    tenant TEXT NOT NULL,
    request TEXT NOT NULL,
    -- BLAKE3 of what was asked.
    hash TEXT NOT NULL,
    -- The answer; none while it is worked on.
    answer TEXT,
    created_ms BIGINT NOT NULL,
    PRIMARY KEY (tenant, request)
);
