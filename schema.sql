-- The controller's database, version 1: SQLite, STRICT tables. `schema-2.sql` makes it version 2 (`PRAGMA user_version`).
--
-- The first eight tables are those of the thesis (section 3.3) by its names and columns; further columns and tables are
-- bootcache's own. Times are milliseconds since 1970. The database is opened with WAL, full sync and foreign keys on;
-- `src/controller/database.rs` is the only code that speaks SQL. A change of this file is a new version: add a step to
-- its migrations, and never change an old one.

-- A node of the cluster.
CREATE TABLE host (
    host_id      INTEGER PRIMARY KEY AUTOINCREMENT,
    status       TEXT    NOT NULL CHECK (status IN ('online', 'offline')),
    type         TEXT    NOT NULL CHECK (type IN ('compute', 'image')),  -- compute nodes have an image service too
    name         TEXT    NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 63),
    address      TEXT    NOT NULL,            -- ADDRESS:PORT of its agent
    peer         TEXT,                        -- ADDRESS:PORT on which its data plane serves peers
    kinds        TEXT    NOT NULL,            -- what it runs: 'vm', 'container', 'vm container', ''
    cpus         INTEGER NOT NULL CHECK (cpus >= 0),
    memory       INTEGER NOT NULL CHECK (memory >= 0),       -- bytes
    memory_free  INTEGER NOT NULL DEFAULT 0 CHECK (memory_free >= 0),
    troubles     TEXT    NOT NULL DEFAULT '',  -- what is wrong with it, a line each
    last_seen    INTEGER NOT NULL
) STRICT;

-- An address that some host has.
CREATE TABLE ip (
    ip_id    INTEGER PRIMARY KEY,
    ip_addr  TEXT NOT NULL UNIQUE,
    ip_type  TEXT NOT NULL CHECK (ip_type IN ('IPv4', 'IPv6'))
) STRICT;

-- Which host has which address, on a card with which hardware address.
CREATE TABLE host_ip (
    host_id   INTEGER NOT NULL REFERENCES host ON DELETE CASCADE,
    ip_id     INTEGER NOT NULL REFERENCES ip,
    bind_mac  TEXT    NOT NULL,               -- '' for an address without a card of its own
    PRIMARY KEY (host_id, ip_id)
) STRICT, WITHOUT ROWID;

-- An image that some host has. A name means one image in the whole cluster: the first that was registered.
CREATE TABLE image (
    img_id    INTEGER PRIMARY KEY,
    img_type  TEXT    NOT NULL CHECK (img_type IN ('vm', 'container')),
    img_name  TEXT    NOT NULL UNIQUE CHECK (length(img_name) BETWEEN 1 AND 63),
    os_type   TEXT    NOT NULL DEFAULT '',    -- free text for people
    img_size  INTEGER NOT NULL CHECK (img_size >= 0),   -- bytes that a guest sees
    bt_size   INTEGER NOT NULL CHECK (bt_size >= 0),    -- bytes of its boot cache, 0: it has none
    root      TEXT    NOT NULL CHECK (length(root) = 64) -- its identity: root of the digest tree, hexadecimal
) STRICT;

-- Which host has how much of which image.
CREATE TABLE host_img (
    host_id        INTEGER NOT NULL REFERENCES host ON DELETE CASCADE,
    img_id         INTEGER NOT NULL REFERENCES image ON DELETE CASCADE,
    present        INTEGER NOT NULL CHECK (present >= 0),     -- bytes that are there
    allocated      INTEGER NOT NULL CHECK (allocated >= 0),   -- bytes that there are, zeroes left out
    received       INTEGER NOT NULL CHECK (received >= 0),    -- bytes that came over the network
    complete       INTEGER NOT NULL CHECK (complete IN (0, 1)),
    boot_complete  INTEGER NOT NULL CHECK (boot_complete IN (0, 1)),
    PRIMARY KEY (host_id, img_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX host_img_by_image ON host_img (img_id);

-- What load items there are; more may be added.
CREATE TABLE load_item (
    item_id  INTEGER PRIMARY KEY,
    name     TEXT NOT NULL UNIQUE
) STRICT;
INSERT INTO load_item VALUES (0, 'cpu'), (1, 'memory'), (2, 'disk'), (3, 'network');

-- The load of a host, each item from 0 to 1.
CREATE TABLE host_load (
    host_id  INTEGER NOT NULL REFERENCES host ON DELETE CASCADE,
    item_id  INTEGER NOT NULL,
    value    REAL    NOT NULL CHECK (value BETWEEN 0 AND 1),
    PRIMARY KEY (host_id, item_id)
) STRICT, WITHOUT ROWID;

-- A deployment, from its order until nothing of it is left. Numbers are never used again.
CREATE TABLE task (
    task_id      INTEGER PRIMARY KEY AUTOINCREMENT,
    task_status  TEXT    NOT NULL CHECK (task_status IN ('starting', 'running', 'failed', 'ending')),
    name         TEXT    NOT NULL,
    request      TEXT    NOT NULL UNIQUE CHECK (length(request) BETWEEN 1 AND 64),  -- the user's, see docs/protocol.md
    plan         TEXT    NOT NULL,            -- JSON
    created      INTEGER NOT NULL,
    up           INTEGER                      -- when its last instance was up
) STRICT;

-- One host's part of a task.
CREATE TABLE part (
    task_id   INTEGER NOT NULL REFERENCES task ON DELETE CASCADE,
    host_id   INTEGER NOT NULL REFERENCES host,
    body      TEXT    NOT NULL,               -- JSON: what the host is ordered to run, without the images' sources
    accepted  INTEGER NOT NULL DEFAULT 0 CHECK (accepted IN (0, 1)),
    PRIMARY KEY (task_id, host_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX part_by_host ON part (host_id);

-- A VM or a container.
CREATE TABLE instance (
    inst_id      INTEGER PRIMARY KEY AUTOINCREMENT,
    inst_type    TEXT    NOT NULL CHECK (inst_type IN ('vm', 'container')),
    inst_status  TEXT    NOT NULL
                 CHECK (inst_status IN ('preparing', 'booting', 'running', 'stopped', 'failed', 'lost')),
    host_id      INTEGER NOT NULL REFERENCES host,
    task_id      INTEGER NOT NULL REFERENCES task ON DELETE CASCADE,
    name         TEXT    NOT NULL UNIQUE,
    image        TEXT    NOT NULL,            -- its image's name
    addresses    TEXT    NOT NULL,            -- separated by spaces
    reason       TEXT,                        -- why it failed
    up           INTEGER,                     -- when it was up
    began        INTEGER,                     -- when it began to boot
    time_limit   INTEGER,                     -- ms it may boot when it is to report; NULL: its node watches that
    cpu          REAL    NOT NULL DEFAULT 0,  -- processors in use
    memory       INTEGER NOT NULL DEFAULT 0,  -- bytes in use
    received     INTEGER NOT NULL DEFAULT 0,  -- bytes over its network cards
    sent         INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX instance_by_task ON instance (task_id);
CREATE INDEX instance_by_host ON instance (host_id);

-- What is to be remembered once.
CREATE TABLE setting (
    name   TEXT PRIMARY KEY,
    value  TEXT NOT NULL
) STRICT, WITHOUT ROWID;
