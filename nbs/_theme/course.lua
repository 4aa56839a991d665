-- A chapter says its title, its promise and the captions of its figures in Markdown cells, so that JupyterLab shows
-- them. On the page Quarto shows all three by itself, from the front matter and from `fig-cap`: here ours are dropped.

-- A page in Chinese marks the language of each cell and gives its headings their English anchors, again for
-- JupyterLab. The page has its language in its head, and its headings take the anchors.

local say = pandoc.utils.stringify

-- `<span id="start"></span>` in a paragraph of its own: the anchor, or nil.
local function anchor(el)
  local span = el and el.t == "Para" and #el.content == 1 and el.content[1]
  return span and span.t == "Span" and #span.content == 0 and span.identifier ~= "" and span.identifier or nil
end

function Pandoc(doc)
  local title = doc.meta.title and say(doc.meta.title)
  local subtitle = doc.meta.subtitle and say(doc.meta.subtitle)
  local lang = doc.meta.lang and say(doc.meta.lang):match("^%a+")  -- Quarto makes zh-Hans of zh
  local promised = false  -- the promise is the first paragraph; the same words later would be meant
  return doc:walk({
    Header = function(el)
      if el.level == 1 and say(el.content) == title then return {} end
    end,
    Para = function(el)
      if not promised and say(el.content) == subtitle then
        promised = true
        return {}
      end
    end,
    Div = function(el)
      if el.classes:includes("figure-caption") then return {} end
      if lang and el.attributes.lang == lang and #el.classes == 0 then return el.content end
    end,
    Blocks = function(blocks)
      local kept = pandoc.List()
      for _, el in ipairs(blocks) do
        local name = el.t == "Header" and anchor(kept[#kept])
        if name then
          kept:remove()
          el.identifier = name
        end
        kept:insert(el)
      end
      return kept
    end,
  })
end
