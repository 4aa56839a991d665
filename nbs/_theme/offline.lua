-- Runs after the book is rendered: takes out the script tags that Quarto adds for interactive
-- widgets whenever a page shows an HTML output. They load RequireJS and jQuery from a CDN; no
-- chapter uses either (tests/test_book.py), and the book has to read offline. The folder in which
-- the book was made, which the embedded home page carries, goes too.
for path in (os.getenv("QUARTO_PROJECT_OUTPUT_FILES") or ""):gmatch("[^\n]+") do
  if path:match("%.html$") then
    local file = assert(io.open(path, "rb"))
    local html = file:read("a")
    file:close()
    local clean = html:gsub('<script src="https://cdn%.jsdelivr%.net/npm/requirejs@[^>]*></script>%s*', "")
    clean = clean:gsub('<script src="https://cdn%.jsdelivr%.net/npm/jquery@[^>]*></script>%s*', "")
    clean = clean:gsub("<script type=\"application/javascript\">define%('jquery'.-</script>%s*", "")
    clean = clean:gsub(' data%-notebook="[^"]*"', "")
    if clean ~= html then
      file = assert(io.open(path, "wb"))
      file:write(clean)
      file:close()
    end
  end
end
