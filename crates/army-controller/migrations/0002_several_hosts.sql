-- Where a host's node listens; none where it is in the controller's own process.
ALTER TABLE hosts ADD COLUMN address TEXT;

CREATE TABLE join_tokens (
    -- BLAKE3 of the secret, which has 256 bits of its own.
    hash TEXT PRIMARY KEY NOT NULL,
    expires_ms BIGINT NOT NULL
);

CREATE TABLE template_copies (
    template TEXT NOT NULL,
    host TEXT NOT NULL,
    PRIMARY KEY (template, host)
);

INSERT INTO template_copies (template, host) SELECT name, host FROM templates;
