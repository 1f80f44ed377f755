-- The tenant that owns a template; '' is the administrators. `given_name` is unique in the tenant.
-- `name` stays the name under which hosts store the template: it is unique everywhere, and the one by
-- which VMs, copies and tags refer to it.
ALTER TABLE templates ADD COLUMN tenant TEXT NOT NULL DEFAULT '';
ALTER TABLE templates ADD COLUMN given_name TEXT NOT NULL DEFAULT '';
-- private, shared or public
ALTER TABLE templates ADD COLUMN visibility TEXT NOT NULL DEFAULT 'private';
UPDATE templates SET given_name = name, visibility = 'public';
CREATE UNIQUE INDEX templates_given_names ON templates (tenant, given_name);

-- The tenants that can use a shared template.
CREATE TABLE template_shares (
    template TEXT NOT NULL,
    tenant TEXT NOT NULL,
    PRIMARY KEY (template, tenant)
);

-- A tag belongs to the tenant of its template.
CREATE TABLE tags (
    tenant TEXT NOT NULL,
    tag TEXT NOT NULL,
    template TEXT NOT NULL,
    PRIMARY KEY (tenant, tag)
);
INSERT INTO tags (tenant, tag, template) SELECT '', tag, template FROM template_tags;
DROP TABLE template_tags;

-- The template of a VM by its full name; NULL where hosts store it under that name.
ALTER TABLE vms ADD COLUMN template_name TEXT;

-- More of what a tenant may have; NULL is unlimited. Standbys are those that its own templates keep on
-- each host, none of which a tenant has unless an administrator permits them.
ALTER TABLE tenants ADD COLUMN max_disk_bytes BIGINT;
ALTER TABLE tenants ADD COLUMN max_templates BIGINT;
ALTER TABLE tenants ADD COLUMN max_standbys BIGINT DEFAULT 0;

-- The network policy within which those of the tenant's VMs are, in JSON; NULL where there is none.
ALTER TABLE tenants ADD COLUMN network TEXT;

-- The addresses that the host has given a VM, in JSON; NULL where there are none.
ALTER TABLE vms ADD COLUMN addresses TEXT;

-- What a VM counts for: the sizes of its writable disks.
ALTER TABLE vms ADD COLUMN disk_bytes BIGINT NOT NULL DEFAULT 0;
DROP INDEX vms_counted;
CREATE INDEX vms_counted ON vms (tenant, memory_bytes, vcpus, disk_bytes) WHERE alive = 1;
