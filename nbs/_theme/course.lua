-- A chapter says its title, its promise and the captions of its figures in Markdown cells, so that JupyterLab shows
-- them. On the page Quarto shows all three by itself, from the front matter and from `fig-cap`: here ours are dropped.

local say = pandoc.utils.stringify

function Pandoc(doc)
  local title = doc.meta.title and say(doc.meta.title)
  local subtitle = doc.meta.subtitle and say(doc.meta.subtitle)
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
    end,
  })
end
