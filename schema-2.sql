-- From version 1 of the controller's database to version 2.

-- Requests whose tasks have ended, the last ten thousand: the same one again starts nothing. Those of tasks that are there
-- are in `task`.
CREATE TABLE request (
    request  TEXT    PRIMARY KEY CHECK (length(request) BETWEEN 1 AND 64),
    task_id  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX request_by_task ON request (task_id);

-- An image's boot cache, by the digest of its heads, as the host says that registered the image first: nodes take no
-- other, since a guest reads it before the digests of its blocks are there.
ALTER TABLE image ADD COLUMN boot TEXT CHECK (boot IS NULL OR length(boot) = 64);
ALTER TABLE image ADD COLUMN publisher INTEGER REFERENCES host (host_id) ON DELETE SET NULL;
-- What a host itself has: it may have begun with the image before that was recorded, or recorded anew.
ALTER TABLE host_img ADD COLUMN bt_size INTEGER NOT NULL DEFAULT 0 CHECK (bt_size >= 0);
ALTER TABLE host_img ADD COLUMN boot TEXT CHECK (boot IS NULL OR length(boot) = 64);
ALTER TABLE host_img ADD COLUMN boot_told INTEGER NOT NULL DEFAULT 0 CHECK (boot_told IN (0, 1));

-- Nothing read it: load items have their names in the program.
DROP TABLE load_item;
