-- Where events are sent. A tenant of '' is administrators, who get the events of all.
CREATE TABLE webhooks (
    id TEXT PRIMARY KEY NOT NULL,
    tenant TEXT NOT NULL,
    url TEXT NOT NULL,
    -- The kinds of events, in JSON; an empty list is all.
    events TEXT NOT NULL,
    -- It signs, so it cannot be a hash.
    secret TEXT NOT NULL,
    -- 1 where the URL may lead to addresses that are not public.
    trusted BIGINT NOT NULL,
    created_ms BIGINT NOT NULL,
    -- The id of the last event that was delivered, or is of no interest.
    delivered BIGINT NOT NULL,
    failures BIGINT NOT NULL,
    failing_since_ms BIGINT,
    error TEXT,
    -- When to try again.
    due_ms BIGINT NOT NULL,
    disabled BIGINT NOT NULL
);

CREATE INDEX webhooks_due ON webhooks (disabled, due_ms);
