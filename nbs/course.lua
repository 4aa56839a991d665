-- Shows the `course:` facts of a chapter's front matter under its title:
--   course:
--     needs: [runtime, evaluation]     names of the chapters to read first
--     minutes-read: 25
--     minutes-run: 2
--     sources: [frantar2023gptq]       keys in references.bib

local function list(value)
  local items = {}
  if value and pandoc.utils.type(value) == "List" then
    for _, item in ipairs(value) do items[#items + 1] = pandoc.utils.stringify(item) end
  end
  return items
end

function Pandoc(doc)
  local course = doc.meta.course
  if not course then return nil end
  local facts = {}
  local needs = {}
  -- A page is called after its notebook without the number, and all pages share one folder.
  for _, name in ipairs(list(course.needs)) do
    needs[#needs + 1] = "[" .. name .. "](" .. name .. ".html)"
  end
  facts[#facts + 1] = "[Read first]{.fact} " .. (#needs > 0 and table.concat(needs, ", ") or "nothing")
  if course["minutes-read"] then
    facts[#facts + 1] = "[To read]{.fact} " .. pandoc.utils.stringify(course["minutes-read"]) .. " min"
  end
  if course["minutes-run"] then
    facts[#facts + 1] = "[To run]{.fact} " .. pandoc.utils.stringify(course["minutes-run"]) .. " min on two CPU cores"
  end
  local sources = list(course.sources)
  if #sources > 0 then
    facts[#facts + 1] = "[Sources]{.fact} @" .. table.concat(sources, "; @")
  end
  local text = "::: {.course-facts}\n- " .. table.concat(facts, "\n- ") .. "\n:::\n"
  local blocks = pandoc.read(text, "markdown").blocks
  blocks:extend(doc.blocks)
  doc.blocks = blocks
  return doc
end
