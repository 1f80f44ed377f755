-- Names that point to a template, and can be pointed to another one.
CREATE TABLE template_tags (
    tag TEXT PRIMARY KEY NOT NULL,
    template TEXT NOT NULL
);
