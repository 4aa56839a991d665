-- For the home page, index.qmd, which embeds nbs/index.ipynb.

-- The book's own title stands on the home page already.
function Header(el)
  if el.level == 1 then return {} end
end

-- Links in the notebook are relative to nbs/ so that they work in JupyterLab; the home page lies
-- one folder up.
function Link(el)
  if el.target:match("^[%w_%-]+%.ipynb") then el.target = "nbs/" .. el.target end
  el.target = el.target:gsub("^%.%./", "")
  return el
end

function Image(el)
  if el.src:match("^_images/") then el.src = "nbs/" .. el.src end
  return el
end
