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
    -- a button that opens a part of the list of chapters is no landmark; the landmarks have different names
    clean = clean:gsub(' role="navigation"( aria%-expanded)', ' role="button"%1')
    clean = clean:gsub('(data%-bs%-toggle="collapse" data%-bs%-target="#quarto%-sidebar%-section%-%d+") aria', '%1 role="button" aria')
    clean = clean:gsub('role="button" role="button"', 'role="button"')
    clean = clean:gsub('<nav id="quarto%-sidebar"', '<nav id="quarto-sidebar" aria-label="Chapters"')
    clean = clean:gsub('<nav class="quarto%-secondary%-nav"', '<nav class="quarto-secondary-nav" aria-label="Where you are"')
    clean = clean:gsub('<nav id="TOC"', '<nav id="TOC" aria-label="On this page"')
    if clean:match('<html[^>]* lang="zh') then
      for english, chinese in pairs({ Chapters = "章节", ["Where you are"] = "当前位置", ["On this page"] = "本页内容" }) do
        clean = clean:gsub('aria%-label="' .. english .. '"', 'aria-label="' .. chinese .. '"')
      end
    end
    if clean ~= html then
      file = assert(io.open(path, "wb"))
      file:write(clean)
      file:close()
    end
  end
end
