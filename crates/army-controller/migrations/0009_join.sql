-- Who has used a token, for which signing request, and the certificate that it got: a host that lost
-- the answer gets the same again. NULL until the token is used.
ALTER TABLE join_tokens ADD COLUMN host TEXT;
ALTER TABLE join_tokens ADD COLUMN request_hash TEXT;
ALTER TABLE join_tokens ADD COLUMN certificate TEXT;
