-- What a VM's network lets it do, in JSON; NULL where nothing was said.
ALTER TABLE vms ADD COLUMN network TEXT;
