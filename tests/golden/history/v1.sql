PRAGMA application_id = 1835625839;
PRAGMA user_version = 1;
CREATE TABLE chats (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    created REAL NOT NULL,
    updated REAL NOT NULL,
    thinking INTEGER NOT NULL,
    preset TEXT NOT NULL,
    model TEXT NOT NULL,
    title TEXT NOT NULL,
    turn INTEGER NOT NULL DEFAULT 0,
    leaf INTEGER REFERENCES messages(id) ON DELETE SET NULL,
    system TEXT NOT NULL
);
CREATE INDEX chats_by_update ON chats(updated);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    chat INTEGER NOT NULL REFERENCES chats(id) ON DELETE CASCADE,
    parent INTEGER REFERENCES messages(id) DEFERRABLE INITIALLY DEFERRED,
    used INTEGER NOT NULL,
    created REAL NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant', 'tool')),
    model TEXT NOT NULL,
    stats TEXT NOT NULL,
    tool_call_id TEXT NOT NULL,
    tool_calls TEXT NOT NULL,
    files TEXT NOT NULL,
    content TEXT NOT NULL,
    reasoning TEXT NOT NULL,
    attachments TEXT NOT NULL
);
CREATE INDEX messages_by_place ON messages(chat, parent);
CREATE INDEX messages_by_parent ON messages(parent);
CREATE INDEX chats_by_leaf ON chats(leaf);
CREATE VIEW search_rows(id, title, body) AS
    SELECT id, '', spaced(content || char(10) || files) FROM messages
    UNION ALL SELECT -id, spaced(title), '' FROM chats;
CREATE VIRTUAL TABLE search USING fts5(
    title, body, content='search_rows', content_rowid='id',
    tokenize='unicode61 remove_diacritics 2', prefix='1 2 3'
);
CREATE TRIGGER message_in AFTER INSERT ON messages BEGIN
    INSERT INTO search(rowid, title, body)
        VALUES (new.id, '', spaced(new.content || char(10) || new.files));
END;
CREATE TRIGGER message_out AFTER DELETE ON messages BEGIN
    INSERT INTO search(search, rowid, title, body)
        VALUES ('delete', old.id, '', spaced(old.content || char(10) || old.files));
END;
CREATE TRIGGER message_new AFTER UPDATE OF content, files ON messages BEGIN
    INSERT INTO search(search, rowid, title, body)
        VALUES ('delete', old.id, '', spaced(old.content || char(10) || old.files));
    INSERT INTO search(rowid, title, body)
        VALUES (new.id, '', spaced(new.content || char(10) || new.files));
END;
CREATE TRIGGER chat_in AFTER INSERT ON chats BEGIN
    INSERT INTO search(rowid, title, body) VALUES (-new.id, spaced(new.title), '');
END;
CREATE TRIGGER chat_out AFTER DELETE ON chats BEGIN
    INSERT INTO search(search, rowid, title, body)
        VALUES ('delete', -old.id, spaced(old.title), '');
END;
CREATE TRIGGER chat_new AFTER UPDATE OF title ON chats BEGIN
    INSERT INTO search(search, rowid, title, body)
        VALUES ('delete', -old.id, spaced(old.title), '');
    INSERT INTO search(rowid, title, body) VALUES (-new.id, spaced(new.title), '');
END;
PRAGMA foreign_keys = OFF;
INSERT INTO chats(id, created, updated, thinking, preset, model, title, turn, leaf, system) VALUES (1, 1790000000.0, 1790000000.0, 0, 'chat', 'demo', '请审查合同', 4, 2, 'be exact');
INSERT INTO messages(id, chat, parent, used, created, role, model, stats, tool_call_id, tool_calls, files, content, reasoning, attachments) VALUES (1, 1, NULL, 1, 1790000000.0, 'user', '', '{}', '', '[]', 'c.txt', '请审查合同', '', '[["c.txt", "the contract"]]');
INSERT INTO messages(id, chat, parent, used, created, role, model, stats, tool_call_id, tool_calls, files, content, reasoning, attachments) VALUES (2, 1, 1, 4, 1790000000.0, 'assistant', '', '{}', '', '[]', '', 'Gladly: §4', 'let me see', '[]');
INSERT INTO messages(id, chat, parent, used, created, role, model, stats, tool_call_id, tool_calls, files, content, reasoning, attachments) VALUES (3, 1, 1, 3, 1790000000.0, 'assistant', '', '{}', '', '[]', '', 'No', '', '[]');
