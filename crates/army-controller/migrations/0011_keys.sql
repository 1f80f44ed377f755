-- What a key is for, in words; when it ends; when it was last used, to the minute; and what it is
-- restricted to, in JSON. NULL where nothing was said.
ALTER TABLE access_keys ADD COLUMN name TEXT;
ALTER TABLE access_keys ADD COLUMN expires_ms BIGINT;
ALTER TABLE access_keys ADD COLUMN used_ms BIGINT;
ALTER TABLE access_keys ADD COLUMN scope TEXT;

-- What the VMs of a tenant may have together; NULL is unlimited.
ALTER TABLE tenants ADD COLUMN max_memory_bytes BIGINT;
ALTER TABLE tenants ADD COLUMN max_vcpus BIGINT;

-- What a VM counts for: the memory and the CPUs of its guest.
ALTER TABLE vms ADD COLUMN memory_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE vms ADD COLUMN vcpus BIGINT NOT NULL DEFAULT 0;

-- What the VMs of a tenant count for, without a look at the VMs.
CREATE INDEX vms_counted ON vms (tenant, memory_bytes, vcpus) WHERE alive = 1;
