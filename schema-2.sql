-- From version 1 of the controller's database to version 2.

-- Requests whose tasks have ended, the last ten thousand: the same one again starts nothing. Those of tasks that are there
-- are in `task`.
CREATE TABLE request (
    request  TEXT    PRIMARY KEY CHECK (length(request) BETWEEN 1 AND 64),
    task_id  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX request_by_task ON request (task_id);

-- Nothing read it: load items have their names in the program.
DROP TABLE load_item;
