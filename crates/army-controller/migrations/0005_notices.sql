-- What a VM's host or guest could not do when it was made, in JSON; NULL where nothing was said.
ALTER TABLE vms ADD COLUMN notices TEXT;
