-- Shows the `course:` facts of a chapter's front matter under its title:
--   course:
--     needs: [runtime, "Python"]       chapters by name (linked), anything else as it stands
--     minutes-read: 25
--     minutes-run: 2                   measured, on two CPU cores
--     sources: ["@frantar2022gptq"]    keys in references.bib

local function list(value)
  local items = {}
  if value and pandoc.utils.type(value) == "List" then
    for _, item in ipairs(value) do items[#items + 1] = pandoc.utils.stringify(item) end
  end
  return items
end

-- Notebook of each chapter by its name: { runtime = "00_runtime.ipynb", ... }
local function notebooks()
  local root = os.getenv("QUARTO_PROJECT_DIR") or quarto.project.directory or "."
  local found = {}
  for _, file in ipairs(pandoc.system.list_directory(root .. "/nbs")) do
    local name = file:match("^%d+_([%w_]+)%.ipynb$")
    if name then found[name] = file end
  end
  return found
end

function Pandoc(doc)
  local course = doc.meta.course
  if not course then return nil end
  local facts, known, needs = {}, notebooks(), {}
  for _, name in ipairs(list(course.needs)) do
    local title = name:gsub("_", " ")
    needs[#needs + 1] = known[name] and ("[" .. title .. "](" .. known[name] .. ")") or name
  end
  facts[#facts + 1] = "[Read first]{.fact} " .. (#needs > 0 and table.concat(needs, ", ") or "nothing")
  if course["minutes-read"] then
    facts[#facts + 1] = "[To read]{.fact} " .. pandoc.utils.stringify(course["minutes-read"]) .. " min"
  end
  if course["minutes-run"] then
    facts[#facts + 1] = "[To run]{.fact} " .. pandoc.utils.stringify(course["minutes-run"]) .. " min on two CPU cores"
  end
  local sources = {}
  for _, key in ipairs(list(course.sources)) do sources[#sources + 1] = "@" .. key:gsub("^@", "") end
  if #sources > 0 then facts[#facts + 1] = "[Sources]{.fact} " .. table.concat(sources, "; ") end

  local text = "::: {.course-facts}\n- " .. table.concat(facts, "\n- ") .. "\n:::\n"
  local blocks = pandoc.read(text, "markdown").blocks
  blocks:extend(doc.blocks)
  doc.blocks = blocks
  return doc
end
